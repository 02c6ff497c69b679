from ...library import implement_natively

implement_natively("embed_tokens", "cpu")
