// Text from a file, before it is trusted.
#pragma once

#include <string>
#include <string_view>

namespace sbd {

bool is_utf8(std::string_view text);

// 'text' for an error's one line: bytes outside printable ASCII as \xNN, cut after 64 characters.
std::string quote(std::string_view text);

}  // namespace sbd
