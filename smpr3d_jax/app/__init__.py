"""The command line: experiment files, the workflow, one stage a line."""
