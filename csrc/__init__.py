"""C++ and CUDA sources. ``cpu/`` is compiled into ``distilkernels._cpp`` when the package is built."""
