"""What a GPU is measured with: ``run.sh`` runs the parts, ``report.py`` makes a page of what they leave."""
