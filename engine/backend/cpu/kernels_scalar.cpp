#define SBD_ISA scalar
#include "backend/cpu/vec_scalar.h"

#include "backend/cpu/kernels_inl.h"
