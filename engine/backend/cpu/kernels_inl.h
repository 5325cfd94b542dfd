// The kernel table of one instruction set: a unit defines SBD_ISA, includes its vec_*.h and then
// this. No inline function of a standard header may be used here: the linker could pick this unit's
// copy, compiled for instructions the machine lacks, for baseline code (test_tree.py looks).
//
// A unit that has one dot instruction more than another, SBD_BASE, compiles no more than what uses
// it, products of SBD_OWN: the rest would be the same code again.
#include "backend/cpu/kernels.h"

#include "backend/cpu/quant_layout.h"

namespace sbd::cpu::SBD_ISA {

#define SBD_STRING_OF(x) #x
#define SBD_STRING(x) SBD_STRING_OF(x)

// Internal linkage for all that follows, templates included.
namespace {

enum class Operands { floats, bf16, bytes };
#ifdef SBD_BASE
static constexpr bool is_own(Operands operands) { return operands == Operands::SBD_OWN; }
#else
#define SBD_BASE SBD_ISA
static constexpr bool is_own(Operands) { return true; }
#endif

#include "backend/cpu/linear_inl.h"

#include "backend/cpu/math_inl.h"

#include "backend/cpu/attention_products_inl.h"

#include "backend/cpu/attention_cache_inl.h"

#include "backend/cpu/attention_inl.h"

#include "backend/cpu/peaks_inl.h"

}  // namespace

const Kernels kernels = {
    SBD_STRING(SBD_ISA),
    ShortProducts::kPerWord,
    linear,
    attention,
    merge_attention,
    run_stats,
    exp_sum,
    rms_norm,
    swiglu,
    rotate,
    quantize,
    to_bf16,
    to_half,
    peak_read,
    peak_dots,
};

}  // namespace sbd::cpu::SBD_ISA
