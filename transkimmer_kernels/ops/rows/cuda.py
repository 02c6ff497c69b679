from ...library import implement_natively

implement_natively("gather_rows", "cuda")
implement_natively("scatter_rows", "cuda")
