"""Reports: teacher and students compared, as numbers, as a table, and as one page that needs nothing else."""

from fewstep.report.collect import report_runs
from fewstep.report.comparison import Comparison, Row, compare_models
from fewstep.report.runs import RunCourse, read_run

__all__ = ["Comparison", "Row", "RunCourse", "compare_models", "read_run", "report_runs"]
