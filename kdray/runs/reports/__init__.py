"""Parts of the HTML pages about runs: templates, figures, tables, cost, and the comparison of several runs."""
