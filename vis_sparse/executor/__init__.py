"""The executor: text rows and visual rows through the decoder layers, each layer doing what its plan asks for."""
