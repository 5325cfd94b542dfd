#define SBD_ISA neon
#include "backend/cpu/vec_neon.h"

#include "backend/cpu/kernels_inl.h"
