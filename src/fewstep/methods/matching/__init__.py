"""Distribution matching: the student's samples follow the difference of two scores."""
