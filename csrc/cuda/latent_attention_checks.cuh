// What the launchers of latent attention see to before anything runs.
#pragma once

#include <initializer_list>
#include <utility>

#include "cuda/dispatch.cuh"
#include "cuda/latent_attention.h"

namespace flamingo {

constexpr char kLatentOp[] = "latent_attention";

// Raises: std::invalid_argument for sizes that do not fit, or that 32 bits do not hold, and for rows not on 16 bytes.
inline void check_latent(Precision precision, const LatentInputs& in,
                         std::initializer_list<std::pair<const char*, View>> more = {}) {
  constexpr int64_t kMost = 2147483647 - 1024;  // rows and keys are counted in 32 bits, to the end of a tile
  const LatentSizes& size = in.size;
  if (size.G < 1 || size.H < 1 || size.H % size.G || size.splits < 1) {
    throw std::invalid_argument(std::string(kLatentOp) + ": heads do not divide, or there are no splits");
  }
  if (int64_t{size.R} * (size.H / size.G) > kMost || size.S > kMost || size.latents > kMost) {
    throw std::invalid_argument(std::string(kLatentOp) + ": more queries of a key head, or keys, than 32 bits count");
  }
  const auto check = [&](const char* name, const View& view) { check_view(kLatentOp, name, view, precision, size.D); };
  check("q", in.q), check("k_media", in.k_media), check("v_media", in.v_media);
  check("k_latents", in.k_latents), check("v_latents", in.v_latents);
  for (const auto& [name, view] : more) check(name, view);
}

}  // namespace flamingo
