"""The embedded default: scikit-learn's digits, their teacher and their two encoders."""
