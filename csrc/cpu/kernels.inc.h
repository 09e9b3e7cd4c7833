// The kernels of one instruction set: included inside its namespace, after its vector type.

#include "vec_double.h"
#include "rows.inc.h"
#include "vocab_stats.inc.h"
#include "vocab_stats_backward.inc.h"
#include "pair_stats.inc.h"
#include "gather_dot.inc.h"
#include "topk_select.inc.h"
#include "draw_rows.inc.h"
#include "filter_rows.inc.h"
#include "uniforms.inc.h"
#include "sample_rows.inc.h"
#include "products.inc.h"
#include "near_pairs.inc.h"
#include "key_redundancy.inc.h"
#include "window_importance.inc.h"
#include "kv_gather.inc.h"
#include "kv_align.inc.h"
#include "recurrence_update.inc.h"

extern const Kernels kernels = {vocab_stats, vocab_stats_backward, pair_stats, pair_stats_backward, gather_dot, gather_dot_hidden_grad,
                                gather_dot_weight_grad, topk_select, draw_rows, filter_rows, sample_rows, weigh_rows, window_importance,
                                key_redundancy, kv_gather, kv_align, recurrence_update};
