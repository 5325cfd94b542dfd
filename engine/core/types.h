#pragma once

#include <cstdint>

namespace sbd {

using TokenId = std::int32_t;

}  // namespace sbd
