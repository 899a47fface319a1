"""Answers that models write: exact match with expected answers, and programs that have to pass tests."""
