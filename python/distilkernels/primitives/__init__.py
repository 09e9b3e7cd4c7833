"""The reductions over the long axis, one file each: signature, reference in plain PyTorch, autograd, op registration."""
