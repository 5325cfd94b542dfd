#include "decode/full_context.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace sbd {

FullContextDecoder::FullContextDecoder(DecodeTask task, const BlockMethod& method)
    : BlockwiseDecoder(std::move(task), method) {
  block_ = make_block(0);
}

Block FullContextDecoder::make_block(int begin) const {
  const int size = std::min(block_size_, task_.tokens_wanted() - begin);
  return block_at(task_, begin, size, method_.mask_token_id);
}

Sharing FullContextDecoder::sharing() const { return {}; }

void FullContextDecoder::begin_behind(int n_cached) {
  SBD_CHECK(n_cached == 0, "nothing is cached, yet {} positions are", n_cached);
}

Demand FullContextDecoder::demand() const {
  return {.least_rows = prompt_size() + task_.tokens_wanted(), .prompt_rows = 0};
}

Plan FullContextDecoder::plan(const Budget&) const {
  Segment all{.tokens = task_.prompt,
              .attention = Attention::block,
              .kv = Kv::scratch,
              .outputs = candidates(),
              .decides = method_.logit_shift,
              .sampling = task_.sampling};
  for (int& row : all.outputs) {
    row += first_row();
  }
  all.tokens.insert(all.tokens.end(), text_.begin(), text_.end());
  all.tokens.insert(all.tokens.end(), block_.tokens().begin(), block_.tokens().end());
  all.tokens.resize(static_cast<std::size_t>(prompt_size() + task_.tokens_wanted()),
                    method_.mask_token_id);
  all.sampling.draw = draw();
  rules_.ask_all(all);
  return {{std::move(all)}};
}

Events FullContextDecoder::absorb(const Plan& plan, std::span<const RowStats> stats) {
  check_rows(plan, stats);
  std::vector<int> positions = plan.segments[0].outputs;
  for (int& position : positions) {
    position -= first_row();
  }
  Events events;
  decide(positions, stats, events);
  if (block_.commit(task_, events) && !events.finished) {
    text_.insert(text_.end(), block_.tokens().begin(), block_.tokens().end());
    block_ = make_block(block_.begin() + block_.size());
    forwards_ = 0;
  }
  return events;
}

}  // namespace sbd
