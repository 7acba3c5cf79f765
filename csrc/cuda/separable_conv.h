#pragma once

#include "../separable_conv.h"

namespace perfvl::cuda {

// output = post(bias + depthwise pre(input * scale + shift)): output channel c m + j reads input channel c; outside
// pixels of pre(...) are 0. Images have any strides, all of one dtype; null scale, shift and bias are 1, 0 and 0.
struct DepthwiseConv {
  Image input;
  int64_t batch, channels, multiplier, outputs;  // outputs = C m
  Side h, w;
  const float *scale, *shift;  // [C]
  Image weight;                // [C m, 1, kh, kw]
  const void* bias;            // [C m]
  int64_t bias_stride;
  Activation pre, post;
  Image output;
  float *mean, *variance;  // [C m] of the output as stored, or null
};

// Gradients of `forward` without bias and post; its output and statistics are not read. Null results are not wanted.
struct DepthwiseConvBackward {
  DepthwiseConv forward;
  Image grad_output;
  Image grad_input;
  float *grad_scale, *grad_shift;  // [C], both or neither
  void* grad_weight;               // dense
};

// All pointers are of the device; `stream` is a cudaStream_t. Return a cudaError_t. Nothing may be empty. At most
// kLargestKernel taps, and 2^31 pixels of an output or input channel in the whole batch.
constexpr int64_t kLargestKernel = 8192;
int64_t depthwise_conv_scratch_bytes(const DepthwiseConv& conv);
int depthwise_conv(const DepthwiseConv& conv, void* scratch, void* stream);
int64_t depthwise_conv_backward_scratch_bytes(const DepthwiseConvBackward& backward);
int depthwise_conv_backward(const DepthwiseConvBackward& backward, void* scratch, void* stream);

}  // namespace perfvl::cuda
