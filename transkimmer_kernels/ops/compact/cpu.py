from ...library import implement_natively

implement_natively("compact", "cpu")
