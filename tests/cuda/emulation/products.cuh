// SPDX-License-Identifier: Apache-2.0
// The tensor core's products (cuda/src/prefill.cuh) by their meaning: included there, in
// dw::prefill, instead of the instructions. Tokens are read as the tensor core reads them, by the
// swizzle of absolute addresses. Products are done at once.

inline void keep(Fragments&) {}
template <int>
void wait_products() {}
inline void take_registers() {}
inline void give_registers() {}

template <int kTiles>
void begin_products(Sums (&sums)[kTiles], Fragments& weights, const unsigned char* tokens,
                    int pitch) {
  static float rows[32][16][kTileDepth];  // of every warp
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
  auto& own = rows[threadIdx.x / 32];
  __syncwarp();
  for (int i = 0; i < kTileDepth / 16; ++i) {
    for (int r = 0; r < 4; ++r) {
      const int row = q + 8 * (r % 2), k = 16 * i + 2 * c + 8 * (r / 2);
      own[row][k] = __low2float(pair_of(weights[i][r]));
      own[row][k + 1] = __high2float(pair_of(weights[i][r]));
    }
  }
  __syncwarp();
  for (int t = 0; t < kTiles; ++t) {
    for (int j = 0; j < kTileRows / 8; ++j) {
      for (int i = 0; i < 2; ++i) {
        float token[kTileDepth], first = 0.f, second = 0.f;
        for (int k = 0; k < kTileDepth; k += 8) {
          size_t at =
              reinterpret_cast<size_t>(tokens) + t * pitch + (8 * j + 2 * c + i) * 128 + 2 * k;
          at ^= (at >> 7 & 7) << 4;
          for (int n = 0; n < 8; ++n) {
            token[k + n] = __half2float(reinterpret_cast<const __half*>(at)[n]);
          }
        }
        for (int k = 0; k < kTileDepth; ++k) {
          first += own[q][k] * token[k];
          second += own[q + 8][k] * token[k];
        }
        sums[t][j][i] += first;
        sums[t][j][2 + i] += second;
      }
    }
  }
}
