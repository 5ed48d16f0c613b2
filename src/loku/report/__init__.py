"""Reports and model cards, made from the plain files of a run folder; no model and no torch is needed."""
