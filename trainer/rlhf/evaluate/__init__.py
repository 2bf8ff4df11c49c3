"""Before and after: judge, KL, samples, report."""
