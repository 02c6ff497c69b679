from ...library import implement_natively

implement_natively("gather_rows", "cpu")
implement_natively("scatter_rows", "cpu")
