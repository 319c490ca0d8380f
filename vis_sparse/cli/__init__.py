"""The command line program `vis-sparse`, a module for each command; `main.app` puts them together."""
