"""(being written)"""
def why_not(primitive, *tensors):
    return "not built"
