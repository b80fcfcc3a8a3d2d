"""Everything that touches Ray: command line, controller, fleet of workers, and what the user watches."""
