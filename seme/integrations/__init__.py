"""seme inside other tools. Each module imports the tool that it is for."""
