"""Ours beside other libraries: by steps per second (`speed`), and by learning (`versus`)."""
