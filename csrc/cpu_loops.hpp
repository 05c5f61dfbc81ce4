// What kdfast._C binds of batch norms, branches, denoising steps and losses on a CPU. Tensors come as
// addresses (0: there is none): the caller in kdfast/ops has checked device, dtype and layout, and a view of
// each would cost more than a small call.
#pragma once

#include "bound.hpp"
#include "branch_loops.hpp"
#include "denoise_loops.hpp"
#include "dist_loop.hpp"
#include "jsd_loop.hpp"
#include "noise_loops.hpp"
#include "norm_loops.hpp"
#include "topk_loop.hpp"

namespace kdfast {
namespace {

// (batch, channels, inner, weight, bias, running mean, running variance, mean, rstd, momentum, eps,
// training).
using NormArguments = std::tuple<int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                                 uintptr_t, uintptr_t, double, double, bool>;

Norm norm_of(const NormArguments& given) {
  const auto& [batch, channels, inner, weight, bias, running_mean, running_var, mean, rstd, momentum, eps,
               training] = given;
  return {batch,
          channels,
          inner,
          at<const float>(weight),
          at<const float>(bias),
          at<float>(running_mean),
          at<float>(running_var),
          at<float>(mean),
          at<float>(rstd),
          momentum,
          eps,
          training};
}

using GradientArguments = std::array<uintptr_t, 4>;

NormGradients gradients_of(const GradientArguments& given) {
  return {at<float>(given[0]), at<float>(given[1]), at<float>(given[2]), at<float>(given[3])};
}

void bind_cpu_loops(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def(
      "norm_act",
      [](const NormArguments& norm, bool relu, float scale, float carry, uintptr_t x, uintptr_t residual,
         uintptr_t y, int64_t threads) {
        norm_act(norm_of(norm), {relu, scale, carry}, at<const float>(x), at<const float>(residual),
                 at<float>(y), threads);
      },
      unlocked, "act(scale·BN(x) + carry·residual) of dense float32; in training statistics are written.");
  module.def(
      "norm_act_backward",
      [](const NormArguments& norm, bool relu, float scale, float carry, uintptr_t upstream, uintptr_t x,
         uintptr_t y, const GradientArguments& grads, int64_t threads) {
        norm_act_backward(norm_of(norm), {relu, scale, carry}, at<const float>(upstream), at<const float>(x),
                          at<const float>(y), gradients_of(grads), threads);
      },
      unlocked, "Gradients of x, residual, weight and bias; y is read where a ReLU followed a residual.");
  module.def(
      "norm_mse",
      [](const NormArguments& norm, bool known, uintptr_t x, uintptr_t target, double upstream,
         const GradientArguments& grads, int64_t threads) {
        return norm_mse(norm_of(norm), known, at<const float>(x), at<const float>(target), upstream,
                        gradients_of(grads), threads);
      },
      unlocked, "mean((BN(x) - target)²), and the gradients of `upstream` times it.");
  module.def(
      "branch_recursion",
      [](const std::array<int64_t, 7>& shape, uintptr_t branches, uintptr_t target, uintptr_t u, uintptr_t v,
         uintptr_t order, uintptr_t noise, uint64_t seed, bool carry, uintptr_t mean, uintptr_t grad,
         uintptr_t grad_mean, double upstream, int64_t threads) {
        const auto& [count, outer, inner, branch_stride, outer_stride, grad_branch_stride,
                     grad_outer_stride] = shape;
        return branch_recursion({count, outer, inner, at<const float>(branches), branch_stride, outer_stride,
                                 at<const float>(target)},
                                {at<const float>(u), at<const float>(v), at<const int64_t>(order),
                                 at<const float>(noise), seed, carry},
                                {at<float>(mean), at<float>(grad), grad_branch_stride, grad_outer_stride,
                                 at<const float>(grad_mean), upstream},
                                threads);
      },
      unlocked, "The recursion's loss, and where they are wanted the branches' mean and gradient.");
  module.def(
      "noised_rows",
      [](uint64_t key, uint32_t step, int64_t rows, int64_t inner, uintptr_t x, uintptr_t scale,
         uintptr_t sigma, uintptr_t out, int64_t threads) {
        noised_rows(
            key, step,
            {rows, inner, at<const float>(x), at<const float>(scale), at<const float>(sigma), at<float>(out)},
            threads);
      },
      unlocked, "scale·x + sigma·ε of dense float32 rows, ε the normals of a step under a key.");
  module.def(
      "noise_mse",
      [](uint64_t key, uint32_t step, int64_t count, uintptr_t x, uintptr_t grad, double upstream,
         int64_t threads) {
        return noise_mse(key, step, count, at<const float>(x), at<float>(grad), upstream, threads);
      },
      unlocked, "mean((x - ε)²) of dense float32, ε as above, and the gradient of `upstream` times it.");
  module.def(
      "denoise_step",
      [](const std::array<int64_t, 4>& shape, uintptr_t coefficients, uintptr_t sample, uintptr_t conditional,
         uintptr_t unconditional, float guidance, const std::array<uintptr_t, 3>& history, uintptr_t noise,
         float clip, uintptr_t y, uintptr_t x0, int64_t threads) {
        const auto& [rows, inner, half, output_stride] = shape;
        StepRow row;
        static_assert(sizeof row == 10 * sizeof(float));
        std::memcpy(&row, at<const float>(coefficients), sizeof row);
        denoise_step({rows,
                      inner,
                      half,
                      output_stride,
                      at<const float>(sample),
                      at<const float>(conditional),
                      at<const float>(unconditional),
                      guidance,
                      {at<const float>(history[0]), at<const float>(history[1]), at<const float>(history[2])},
                      at<const float>(noise),
                      clip,
                      at<float>(y),
                      at<float>(x0)},
                     row, threads);
      },
      unlocked, "One step of a linear sampler, of dense float32.");
  module.def(
      "dist_loss",
      [](const std::array<int64_t, 4>& shape, uintptr_t student, uintptr_t teacher, float inverse,
         double beta, double gamma, uintptr_t grad_student, uintptr_t grad_teacher, int64_t threads) {
        const auto& [rows, classes, student_stride, teacher_stride] = shape;
        if (rows < 1 || classes < 1) throw py::value_error("rows, classes: accepted: 1 or more of each");
        return dist_loss(rows, classes, {at<const float>(student), student_stride},
                         {at<const float>(teacher), teacher_stride}, inverse, beta, gamma,
                         {at<float>(grad_student), classes}, {at<float>(grad_teacher), classes}, threads);
      },
      unlocked, "DIST of rows of float32 logits, with inverse = 1/T, and T times its gradients.");
  module.def(
      "jsd_rows",
      [](int64_t rows, int64_t classes, uintptr_t student, int64_t student_stride, uintptr_t teacher,
         int64_t teacher_stride, double inverse, uintptr_t loss, uintptr_t grad_student,
         uintptr_t grad_teacher, int64_t threads, float below, double beta) {
        if (classes < 1)
          throw py::value_error("classes: got " + std::to_string(classes) + ", accepted: 1 or more");
        return jsd_rows(rows, classes, {at<const float>(student), student_stride},
                        {at<const float>(teacher), teacher_stride}, {inverse, below}, beta, at<float>(loss),
                        {at<float>(grad_student), classes}, {at<float>(grad_teacher), classes}, threads);
      },
      unlocked, "JSD(beta) of float32 rows, as kl_rows.");
  module.def(
      "topk_rows",
      [](const std::array<int64_t, 4>& shape, uintptr_t student, const std::array<uintptr_t, 3>& teacher,
         bool bucket, double inverse, uintptr_t loss, uintptr_t grad, int64_t threads) {
        const auto& [rows, classes, stride, kept] = shape;
        if (classes < 1)
          throw py::value_error("classes: got " + std::to_string(classes) + ", accepted: 1 or more");
        return topk_rows(rows,
                         {classes,
                          {at<const float>(student), stride},
                          inverse,
                          {kept, at<const int64_t>(teacher[0]), at<const float>(teacher[1]),
                           at<const float>(teacher[2]), bucket},
                          at<float>(loss),
                          {at<float>(grad), classes}},
                         threads);
      },
      unlocked,
      "KL to (classes, logits, log-sum-exp) kept of a teacher, of float32 rows, and T times its "
      "gradient; a row's loss is NaN where it is to be computed with care.");
}

}  // namespace
}  // namespace kdfast
