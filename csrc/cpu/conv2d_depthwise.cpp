// The row `depthwise` of the table: one filter per channel or a few, and small groups.
//
// Which of five files computes depends on the layout, the number of filters and the size of the image alone.
#include "conv2d_depthwise.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

template <class S>
struct Depthwise {
  using Row = Conv2dAlgorithm<Conv2dRun<S>>;

  static const Row& of(const Conv2dGeometry& g, Pass pass) {
    static const Row contiguous = depthwise_contiguous<S>(), small = depthwise_small<S>(),
                     turned = depthwise_turned<S>(), channels_last = depthwise_channels_last<S>(),
                     groups = depthwise_groups<S>();
    if (g.layout == Layout::contiguous && g.c != g.groups) return turned;
    if (g.layout == Layout::contiguous)
      return contiguous.refuses(g, pass) || small.refuses(g, pass) ? contiguous : small;
    return g.c == g.groups && g.k == g.groups ? channels_last : groups;
  }

  template <Pass pass>
  static Conv2dRun<S> run() {
    return {[](const Conv2dGeometry& g) { return of(g, pass).run(pass).tasks(g); },
            [](const Conv2dGeometry& g) { return of(g, pass).run(pass).workspace(g); },
            [](const Conv2dGeometry& g, const Conv2dOperands<S>& operands, Sum<S>* workspace, int64_t begin,
               int64_t end) { of(g, pass).run(pass).run(g, operands, workspace, begin, end); },
            [](const Conv2dGeometry& g) {
              const Conv2dRun<S>& run = of(g, pass).run(pass);
              return run.parts ? run.parts(g) : 1;
            },
            depthwise_channels_last<S>().run(pass).add_parts};
  }
};

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_depthwise() {
  return {"depthwise",
          "one filter per channel, or few; small groups",
          [](const Conv2dGeometry& g, Pass pass) { return Depthwise<S>::of(g, pass).refuses(g, pass); },
          Depthwise<S>::template run<Pass::forward>(),
          Depthwise<S>::template run<Pass::grad_input>(),
          Depthwise<S>::template run<Pass::grad_weight>()};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_depthwise();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_depthwise();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_depthwise();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_depthwise();

}  // namespace cnnops::cpu::CNNOPS_ISA
