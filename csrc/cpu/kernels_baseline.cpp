#include <algorithm>

#include "../philox.h"
#include "isa.h"

namespace distilkernels {
namespace baseline {
#include "vec_baseline.h"
#include "kernels.inc.h"
}  // namespace baseline
}  // namespace distilkernels
