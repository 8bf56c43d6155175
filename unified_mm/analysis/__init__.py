"""What a person looks at: reports, pictures and tables of runs."""
