from ...library import implement_natively

implement_natively("skim_tokens", "cpu")
