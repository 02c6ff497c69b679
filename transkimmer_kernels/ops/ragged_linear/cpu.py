from ...library import implement_natively

implement_natively("ragged_linear", "cpu")
implement_natively("ragged_linear_norm", "cpu")
implement_natively("ragged_linear_norm_", "cpu")
