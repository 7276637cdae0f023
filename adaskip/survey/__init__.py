"""Run a model to measure it: what each layer, band, plan or decision is worth to each input; trains nothing."""
