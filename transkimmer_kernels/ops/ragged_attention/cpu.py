from ...library import implement_natively

implement_natively("ragged_attention", "cpu")
implement_natively("ragged_attention_backward", "cpu")
