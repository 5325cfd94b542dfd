// What texts must be: one of some choices, or what llguidance has compiled, by way of its Python
// package.
#pragma once

#include <pybind11/pybind11.h>

namespace sbd {

void bind_grammars(pybind11::module_& module);

// Lets go of Python's objects that threads without the GIL are done with. Called with the GIL.
void drop_python_objects();

}  // namespace sbd
