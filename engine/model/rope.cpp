#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace sbd {
namespace {

// What is left of frequency i: all of it where it turns often, 1 / factor where it turns seldom.
// The ramp between goes by the frequency's index, from whole ones.
double kept(const Yarn& yarn, const ModelConfig& config, int i) {
  const auto index_of = [&](double turns) {
    const double wavelength = yarn.original_length / turns;
    return config.head_dim * std::log(wavelength / (2 * std::numbers::pi)) /
           (2 * std::log(config.rope_theta));
  };
  const double first = std::max(std::floor(index_of(yarn.beta_fast)), 0.0);
  const double last = std::min(std::ceil(index_of(yarn.beta_slow)), config.head_dim - 1.0);
  const double divided = std::clamp((i - first) / std::max(last - first, 0.001), 0.0, 1.0);
  return 1 - divided + divided / yarn.factor;
}

}  // namespace

std::vector<float> rope_frequencies(const ModelConfig& config) {
  std::vector<float> result;
  for (int i = 0; i < config.head_dim / 2; ++i) {
    double frequency = std::pow(config.rope_theta, -2.0 * i / config.head_dim);
    frequency /= config.rope_linear_factor;
    if (config.yarn) frequency *= kept(*config.yarn, config, i);
    result.push_back(static_cast<float>(frequency));
  }
  return result;
}

}  // namespace sbd
