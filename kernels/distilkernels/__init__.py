"""Triton kernels, one file per primitive: the device kernels and the host launcher that calls them."""
