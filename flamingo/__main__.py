from flamingo.cli import main

main()
