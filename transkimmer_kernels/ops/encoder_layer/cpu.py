from ...library import implement_natively

implement_natively("encoder_layer_", "cpu")
