// The table of one instruction set. Included last by isa_<name>.cpp, after the vec_<name>.h that defines Vec.
#pragma once

#include "transkimmer/cpu_kernels.h"

#include "attention_backward.h"
#include "attention_forward.h"
#include "norm.h"
#include "product.h"

#define TRANSKIMMER_STRING_(x) #x
#define TRANSKIMMER_STRING(x) TRANSKIMMER_STRING_(x)

namespace transkimmer::cpu::TRANSKIMMER_ISA {

extern const Kernels table;
const Kernels table = {
    TRANSKIMMER_STRING(TRANSKIMMER_ISA),
    attention_forward_scratch,
    {attention_forward<float>, attention_forward<bf16>},
    attention_backward_scratch,
    {attention_backward<float>, attention_backward<bf16>},
    sum_heads,
    norm_scratch,
    {norm_rows<float>, norm_rows<bf16>},
    {norm_gelu_dot<float>, norm_gelu_dot<bf16>},
    kProductColumns,
    {is_paired<float>, is_paired<bf16>},
    {pack_panels<float>, pack_panels<bf16>},
    {product_scratch<float>, product_scratch<bf16>},
    {product<float>, product<bf16>},
};

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
