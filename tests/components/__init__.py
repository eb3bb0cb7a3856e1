"""Components: what a repository holds, how much of it is loaded, and that it equals what the libraries load."""
