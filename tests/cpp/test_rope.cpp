// RoPE's frequencies, against those of transformers 5 at published sizes.
#include "model/rope.h"

#include <cmath>

#include "check.h"

namespace sbd {
namespace {

ModelConfig config(double theta) {
  ModelConfig config;
  config.head_dim = 128;
  config.rope_theta = theta;
  return config;
}

void check_close(float actual, double expected) {
  CHECK(std::abs(actual - expected) <= 2e-6 * expected);
}

}  // namespace

TEST(rope_frequencies_without_and_with_linear_scaling) {
  ModelConfig linear = config(1e4);
  linear.rope_linear_factor = 4;
  for (int i = 0; i < 64; ++i) {
    const double expected = std::pow(1e4, -i / 64.0);
    check_close(rope_frequencies(config(1e4))[i], expected);
    check_close(rope_frequencies(linear)[i], expected / 4);
  }
}

TEST(rope_frequencies_with_yarn) {
  struct Case {
    double theta;
    Yarn yarn;
    int first, last;  // indices with all and with none of the frequency left
    std::vector<std::pair<int, double>> frequencies;
  };
  const Case cases[] = {
      {1e6,  // Qwen3 with its card's rope_scaling
       {.factor = 4, .original_length = 32768},
       23,
       40,
       {{0, 1.0},
        {13, 0.0604296438395977},
        {24, 0.005375321488827467},
        {30, 0.0010643609566614032},
        {40, 4.4456985051510856e-05},
        {63, 3.102344408034696e-07}}},
      {1e9,  // Nemotron-Labs-Diffusion 14B
       {.factor = 16, .original_length = 16384},
       13,
       25,
       {{0, 1.0},
        {13, 0.014855080284178257},
        {20, 0.0006977792363613844},
        {24, 5.9301062719896436e-05},
        {30, 3.7768522815895267e-06},
        {63, 8.639826354350788e-11}}},
  };
  for (const Case& at : cases) {
    ModelConfig with = config(at.theta);
    with.yarn = at.yarn;
    const std::vector<float> actual = rope_frequencies(with);
    for (const auto& [i, expected] : at.frequencies) check_close(actual[i], expected);
    const std::vector<float> plain = rope_frequencies(config(at.theta));
    for (int i = 0; i < 64; ++i) {
      CHECK_EQ(actual[i] == plain[i], i <= at.first);
      const double most = plain[i] / at.yarn.factor;
      CHECK_EQ(std::abs(actual[i] / most - 1) < 1e-6, i >= at.last);
    }
  }
}

}  // namespace sbd
