// Row "amx" of the convolution table: bfloat16 with TDPBF16PS, on processors with AMX-BF16.
// conv_amx.h is the kernel; here is the unit. It is used only after it has computed some thousand
// results as the specification does.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

// Linux lends the tile registers to a process that asks for them.
static bool tiles_permitted() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
static bool has_unit() {
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && tiles_permitted();
}

#if defined(__clang__)
#pragma clang attribute push(                                                                \
    __attribute__((                                                                          \
        target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

#define TNC_ISA amx
#include "vec_avx512.h"

#include "conv_amx.h"

namespace torch_naiveconv::amx {

// What LDTILECFG reads: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64, "as the manual has it");

// Tiles 0 to 3 are totals, 4 and 5 rows, 6 and 7 columns. With one tile of rows there are up to
// four of columns: tile 5 is the third, and the fourth takes the place of the first. If that one
// tile has less than 16 rows, none but these are loaded, multiplied and stored. Who multiplies
// holds one of these; the tile registers are given back with it.
struct MatrixUnit {
  explicit MatrixUnit(int rows = side) {
    TileShapes shapes;
    for (int i = 0; i < 5; ++i) shapes.rows[i] = static_cast<uint8_t>(rows);
    _tile_loadconfig(&shapes);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

  // The intrinsics do not tell the compiler that tiles are read from memory.
  static TNC_INLINE void fence() { __asm__ __volatile__("" ::: "memory"); }

  template <int Total>
  static TNC_INLINE void zero_total() {
    if constexpr (Total == 0) _tile_zero(0);
    if constexpr (Total == 1) _tile_zero(1);
    if constexpr (Total == 2) _tile_zero(2);
    if constexpr (Total == 3) _tile_zero(3);
  }
  template <int Total>
  static TNC_INLINE void load_total(const float* p) {
    if constexpr (Total == 0) _tile_loadd(0, p, 64);
    if constexpr (Total == 1) _tile_loadd(1, p, 64);
    if constexpr (Total == 2) _tile_loadd(2, p, 64);
    if constexpr (Total == 3) _tile_loadd(3, p, 64);
  }
  template <int Total>
  static TNC_INLINE void store_total(float* p) {
    if constexpr (Total == 0) _tile_stored(0, p, 64);
    if constexpr (Total == 1) _tile_stored(1, p, 64);
    if constexpr (Total == 2) _tile_stored(2, p, 64);
    if constexpr (Total == 3) _tile_stored(3, p, 64);
  }
  template <int Tile>
  static TNC_INLINE void load_rows(const BFloat16* p, int64_t row_bytes) {
    if constexpr (Tile == 0) _tile_loadd(4, p, row_bytes);
    if constexpr (Tile == 1) _tile_loadd(5, p, row_bytes);
  }
  template <int Tile>
  static TNC_INLINE void load_columns(const BFloat16* p) {
    if constexpr (Tile == 0 || Tile == 3) _tile_loadd(6, p, 64);
    if constexpr (Tile == 1) _tile_loadd(7, p, 64);
    if constexpr (Tile == 2) _tile_loadd(5, p, 64);
  }
  // total[i] += rows[j] x columns[k]
  template <int Total, int Rows, int Columns>
  static TNC_INLINE void multiply() {
    if constexpr (Rows == 1) {
      if constexpr (Total == 1) _tile_dpbf16ps(1, 5, 6);
      if constexpr (Total == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (Total == 3) _tile_dpbf16ps(3, 5, 7);
    } else {
      if constexpr (Total == 0) _tile_dpbf16ps(0, 4, 6);
      if constexpr (Total == 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (Total == 2) _tile_dpbf16ps(2, 4, 5);
      if constexpr (Total == 3) _tile_dpbf16ps(3, 4, 6);
    }
  }
};

static bool run(const ConvProblem& p) { return run_matrix_unit<MatrixUnit>(p, MatrixLimits{}); }

static bool unit_works() { return unit_is_exact<MatrixUnit>(); }

}  // namespace torch_naiveconv::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif

static bool can_run() {
  static const bool yes = has_unit() && torch_naiveconv::amx::unit_works();
  return yes;
}

namespace torch_naiveconv {
extern const ConvRow conv_amx;
const ConvRow conv_amx{"amx", can_run, amx::run, nullptr};
}  // namespace torch_naiveconv

#elif defined(__x86_64__)

namespace torch_naiveconv {
extern const ConvRow conv_amx;
const ConvRow conv_amx{"amx", [] { return false; }, [](const ConvProblem&) { return false; },
                       nullptr};
}  // namespace torch_naiveconv

#endif
