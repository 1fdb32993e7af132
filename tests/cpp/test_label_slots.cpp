// What csrc/loss/label_slots.h tells of findings that a device writes: here another thread, or this one.
#include "loss/label_slots.h"

#include <cstdio>
#include <thread>
#include <vector>

#include "check.h"

using gdbp::loss::LabelSlots;

namespace {

void expect(bool condition, const char* what) {
  if (condition) return;
  ++check::failures;
  std::printf("%s  FAILED\n", what);
}

struct Device {
  std::vector<int64_t> memory = std::vector<int64_t>(2 * LabelSlots::kSlots, 7);
  void write(int64_t slot, int64_t row, int64_t label) {
    memory[2 * slot] = row;
    memory[2 * slot + 1] = label;
  }
};

void told_once() {
  LabelSlots slots;
  expect(slots.empty() && !slots.take(), "nothing is told before there is memory");
  Device device;
  slots.place(device.memory.data());
  expect(!slots.empty() && !slots.take(), "what lay in the memory is no finding");
  const int64_t good = slots.next(), bad = slots.next();
  expect(good != bad && !slots.take(), "nothing has arrived");
  device.write(good, -1, 0);
  expect(!slots.take(), "-1 is no row");
  device.write(bad, 5, -3);
  const auto found = slots.take();
  expect(found && found->row == 5 && found->label == -3, "the row and its label");
  expect(!slots.take(), "told once");
}

void in_pieces() {
  LabelSlots slots;
  Device device;
  slots.place(device.memory.data());
  const int64_t slot = slots.next();
  device.memory[2 * slot] = 0;
  expect(!slots.take(), "a row waits for its label");
  device.memory[2 * slot + 1] = std::numeric_limits<int64_t>::min();
  const auto found = slots.take();
  expect(found && found->row == 0 && found->label == std::numeric_limits<int64_t>::min(), "any label");
}

// Slots are used in turn; a finding that nobody asked for is forgotten when its slot's turn comes again.
void in_turn() {
  LabelSlots slots;
  Device device;
  slots.place(device.memory.data());
  for (int64_t call = 0; call < 3 * LabelSlots::kSlots; ++call) {
    const int64_t slot = slots.next();
    expect(slot == call % LabelSlots::kSlots, "slots in turn");
    device.write(slot, call, call + 1);
  }
  int64_t told = 0, sum = 0;
  while (const auto found = slots.take()) {
    ++told;
    sum += found->row;
    expect(found->label == found->row + 1, "the label of its own row");
  }
  const int64_t first = 2 * LabelSlots::kSlots, last = 3 * LabelSlots::kSlots - 1;
  expect(told == LabelSlots::kSlots && sum == (first + last) * LabelSlots::kSlots / 2, "the last ones, each once");
}

// The host asks all the while.
void while_it_is_written() {
  LabelSlots slots;
  Device device;
  slots.place(device.memory.data());
  std::vector<int64_t> order;
  for (int64_t i = 0; i < LabelSlots::kSlots; ++i) order.push_back(slots.next());
  std::thread writer([&] {
    for (const int64_t slot : order) {
      __atomic_store_n(&device.memory[2 * slot], slot, __ATOMIC_RELEASE);
      __atomic_store_n(&device.memory[2 * slot + 1], 1000 + slot, __ATOMIC_RELEASE);
    }
  });
  int64_t told = 0;
  while (told < LabelSlots::kSlots) {
    const auto found = slots.take();
    if (!found) continue;
    ++told;
    expect(found->label == 1000 + found->row, "the label of its own row, however late it comes");
  }
  writer.join();
  expect(!slots.take(), "all were told");
}

}  // namespace

int main() {
  told_once();
  in_pieces();
  in_turn();
  while_it_is_written();
  return check::finish();
}
