// Work of more than a moment asks between its parts whether to go on. What is put here may throw,
// which ends the work: the bindings run Python's signal handlers.
#pragma once

namespace sbd {

inline void (*check_interrupt)() = [] {};

}  // namespace sbd
