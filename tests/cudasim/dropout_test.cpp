// The CUDA kernel of dropout against the CPU's, to which it is equal bit for bit.
#include "dropout/dropout.h"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::dropout;

void masks() {
  std::mt19937 generator(1);
  const uint64_t seed = 0x0123456789abcdef;
  for (Dtype dtype : kDtypes) {
    // A vector of each type more or less, a block more or less.
    for (int64_t numel : {0, 1, 3, 4, 9, 1023, 1024, 1025, 5000}) {
      for (double p : {0.0, 0.3, 1.0}) {
        for (int64_t offset : {0, 1}) {
          context = std::string(kDtypeNames[int(dtype)]) + " " + std::to_string(numel) + " at offset " +
                    std::to_string(offset) + ", p " + std::to_string(p);
          const Array in(dtype, numel, offset, generator, 1, 2);
          Array out[2] = {Array(dtype, numel, offset), Array(dtype, numel, offset)};
          Array over = in;
          for (int device : {0, 1}) {
            const Args args{dtype, numel, p, &seed, 3, in.data(), out[device].data()};
            expect((device ? dropout_cuda : dropout_cpu)(args, nullptr) == 0, "the launch fails");
          }
          expect(dropout_cuda({dtype, numel, p, &seed, 3, over.data(), over.data()}, nullptr) == 0, "in place");
          expect_close(out[1], out[0], 0, 0, "output");
          expect_close(over, out[0], 0, 0, "output in place");
          int64_t kept = 0;
          for (int64_t i = 0; i < numel; ++i) kept += out[1].get(i) != 0;
          const double wanted = double(numel) * (1 - p), spread = std::sqrt(double(numel) * p * (1 - p));
          expect(std::abs(double(kept) - wanted) <= 4 * spread, "as many are kept as should not be");
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"masks", masks}};
  return run_cases(argc, argv, cases);
}
