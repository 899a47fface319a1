"""Measurements of models on text: evaluation, merge statistics, extraction audits, embeddings."""
