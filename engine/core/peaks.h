#pragma once

namespace sbd {

// What the machine does at most, measured with every thread: bytes read, and operations (a product
// and its sum are two) on the operands of a matmul, per second.
struct Peaks {
  double read;
  double int8;
  double bf16;
  double f16;
  double f32;
};

}  // namespace sbd
