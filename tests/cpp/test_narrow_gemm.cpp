// The products of narrow networks against long double, next to memory that must not be read.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "check.h"
#include "common/narrow_gemm_cpu.cpp"

namespace {

using namespace gdbp::cpu;
using real = long double;

// Elements that end where a page begins that nobody may touch.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : page_(sysconf(_SC_PAGESIZE)) {
    const int64_t bytes = count * int64_t(sizeof(T));
    size_ = (bytes + page_ - 1) / page_ * page_ + page_;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + size_ - page_, page_, PROT_NONE);
    at = reinterpret_cast<T*>(base_ + size_ - page_ - bytes);
    for (int64_t i = 0; i < count; ++i) at[i] = T(check::uniform(-1, 1));
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;

  T* at;

 private:
  int64_t page_, size_;
  char* base_;
};

template <class T>
struct Errors {
  check::Worst product, added, dots;
};

// c = a b + bias: an error in units of the last place of the largest partial sum, for each of k + 2 roundings.
template <class T, class A, class B>
double error_of(T found, int64_t k, const A& a, const B& b, real first) {
  real sum = first, size = std::fabs(first);
  for (int64_t p = 0; p < k; ++p) {
    sum += real(a(p)) * real(b(p));
    size += std::fabs(real(a(p)) * real(b(p)));
  }
  return double(std::fabs(found - sum) / check::ulp<T>(std::max<real>(size, 1e-3L))) / double(k + 2);
}

template <class T>
void test_sizes(int64_t m, int64_t n, int64_t k, Errors<T>& errors) {
  const Guarded<T> a(m * k), b(k * n), c(m * n), weight(n * k), packed(k * padded<T>(n)), bias(padded<T>(n));
  // The last rows of b lie where there is room behind them.
  const int64_t split = Right<T>::split_of(k, n);
  std::vector<T> last((k - split) * n + kVectorBytes / sizeof(T));
  std::copy(b.at + split * n, b.at + k * n, last.begin());
  const Right<T> right{b.at, n, last.data(), split};
  for (const bool transposed : {false, true}) {
    const int64_t row = transposed ? 1 : k, col = transposed ? m : 1;
    for (const bool adds : {false, true}) {
      std::vector<T> before(c.at, c.at + m * n);
      narrow_gemm<T>({m, n, k, a.at, row, col, right, c.at, n, bias.at, adds});
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
          const real first = real(bias.at[j]) + (adds ? real(before[i * n + j]) : 0);
          const double error = error_of(
              c.at[i * n + j], k, [&](int64_t p) { return a.at[i * row + p * col]; },
              [&](int64_t p) { return b.at[p * n + j]; }, first);
          (adds ? errors.added : errors.product).see(error, double(n));
        }
    }
  }
  pack_transposed(weight.at, n, k, k, packed.at);
  for (int64_t p = 0; p < k; ++p)
    for (int64_t j = 0; j < padded<T>(n); ++j) {
      const T wanted = j < n ? weight.at[j * k + p] : T(0);
      check::failures += packed.at[p * padded<T>(n) + j] != wanted;
    }
  narrow_dots<T>(m, n, k, a.at, weight.at, n % 2 ? bias.at : nullptr, c.at);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double error = error_of(
          c.at[i * n + j], k, [&](int64_t p) { return a.at[i * k + p]; },
          [&](int64_t p) { return weight.at[j * k + p]; }, n % 2 ? real(bias.at[j]) : 0);
      errors.dots.see(error, double(n));
    }
}

// A row of zeros does not hide what an infinity or NaN makes of it.
template <class T>
void test_nonfinite() {
  const T inf = std::numeric_limits<T>::infinity();
  for (const T bad : {inf, std::numeric_limits<T>::quiet_NaN()}) {
    const std::vector<T> a{0, 0}, bias(padded<T>(3), T(1));
    std::vector<T> b(2 * 3 + kVectorBytes / sizeof(T), bad), c(3);
    narrow_gemm<T>({1, 3, 2, a.data(), 2, 1, {b.data(), 3}, c.data(), 3, bias.data()});
    for (const T value : c) check::failures += !std::isnan(value);
    narrow_dots<T>(1, 3, 2, a.data(), b.data(), nullptr, c.data());
    for (const T value : c) check::failures += !std::isnan(value);
  }
}

template <class T>
void test_type() {
  Errors<T> errors;
  for (const int64_t m : {1, 2, 4, 7, 9, 33})
    for (const int64_t n : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 64, 65, 100, 128})
      for (const int64_t k : {1, 2, 5, 15, 16, 17, 64, 100}) test_sizes<T>(m, n, k, errors);
  test_sizes<T>(8, 16, 0, errors);
  test_sizes<T>(0, 16, 8, errors);
  check::report("product", check::type_name<T>, errors.product, 0.5);
  check::report("product, added", check::type_name<T>, errors.added, 0.5);
  check::report("dots", check::type_name<T>, errors.dots, 0.5);
  test_nonfinite<T>();
}

}  // namespace

int main() {
  test_type<float>();
  test_type<double>();
  return check::finish();
}
