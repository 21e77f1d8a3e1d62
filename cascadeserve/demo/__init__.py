"""`cascadeserve demo`: from rows to a certified plan, and what the plan is worth against the largest model alone.

offline      rows, records, profile, plans: made by the real commands, kept while their inputs are unchanged
comparison   sustained rates of three systems under the same load: rate_search decides, measuring runs
slo_curve    the comparison at other SLOs: predicted, and measured in tier full
timeline     a bursty load against the cascade
page         report.json and one self-contained report.html
"""
